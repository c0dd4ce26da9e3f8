"""Files are read as the pipeline's loader reads them."""

import cv2
import mmcv
import numpy as np
import pytest
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image
from png_header import header_only

from mmrpa.data_checks import check_data, images
from mmrpa.data_checks.images import read_image, read_labels
from mmrpa.data_checks.loaders import (
    Decoder,
    image_decoder,
    map_decoder,
)


def codes(report) -> set[str]:
    return {group.code for group in report.findings.problems}


@pytest.mark.parametrize('name', ['a.hdr', 'a.tif'])
def test_what_only_opencv_reads(name, tmp_path):
    path = str(tmp_path / name)
    cv2.imwrite(path, np.ones((8, 12, 3), np.float32))
    facts = read_image(path)
    assert (facts.code, facts.size) == ('', (12, 8))
    assert mmcv.imread(path).shape == (8, 12, 3)
    # Pillow cannot, so a loader that uses it stops.
    assert read_image(path, Decoder('pillow', 'color')).code == 'not-an-image'
    (tmp_path / name).write_text('Not Found')
    assert read_image(path).code == 'not-an-image'


def test_many_pixels(tmp_path, monkeypatch):
    """More than Pillow takes are nothing to OpenCV."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    path = tmp_path / 'a.png'
    pixels = np.zeros((50, 60), np.uint8)
    pixels[0, :7] = 3
    Image.fromarray(pixels).save(path)
    facts = read_image(str(path))
    assert (facts.code, facts.size) == ('', (60, 50))
    # mmseg's loader uses Pillow if it is not told otherwise.
    with pytest.raises(Image.DecompressionBombError):
        LoadAnnotations().transform(dict(
            seg_map_path=str(path), reduce_zero_label=False, seg_fields=[]))
    assert read_labels(str(path)).code == 'too-large'
    facts = read_labels(str(path), Decoder('cv2', 'unchanged'))
    assert (facts.code, facts.size) == ('', (60, 50))
    assert facts.counts == {0: 2993, 3: 7}
    header_only(path, 60, 50)
    assert read_image(str(path)).code == 'truncated-file'


def test_more_pixels_than_opencv_takes(tmp_path):
    path = tmp_path / 'a.png'
    header_only(path, 2**15 + 1, 2**15)
    with pytest.raises(cv2.error):
        mmcv.imread(str(path))
    assert read_image(str(path)).code == 'too-large'


def no_memory(*args, **kwargs):
    raise MemoryError


def test_lack_of_memory_is_not_the_files_fault(make, monkeypatch):
    data = make('mmdet')
    monkeypatch.setattr(images.Image, 'open', no_memory)
    report = check_data(data.cfg, ('train', ))
    assert report.findings.problems == []
    (code, _, text), = report.findings.notes
    assert code == 'unchecked'
    assert text.startswith('12 files were not read for lack of memory')


def test_decoders():
    one = image_decoder([dict(type='mmseg.LoadImageFromFile',
                              color_type='unchanged')])
    assert one == ('cv2', 'unchanged')
    assert image_decoder([dict(type=mmcv.LoadImageFromFile,
                               imdecode_backend='pillow')]) == (
        'pillow', 'color')
    assert image_decoder([dict(type='LoadBiomedicalImageFromFile')]) is None
    assert image_decoder([dict(type='LoadImageFromFile',
                               imdecode_backend='tifffile')]) is None
    assert map_decoder([dict(type='LoadAnnotations')]) == (
        'pillow', 'unchanged')
    assert map_decoder([dict(type=LoadAnnotations,
                             imdecode_backend='cv2')])[0] == 'cv2'


def save_arrays(data) -> None:
    for path in data.files('images/training/*.jpg'):
        np.save(path.with_suffix('.npy'), np.zeros((48, 48, 3)))
    data.train.img_suffix = '.npy'
    data.train.pipeline[0] = dict(type='LoadBiomedicalImageFromFile')


def test_images_of_another_loader(make):
    data = make('mmseg')
    save_arrays(data)
    report = check_data(data.cfg, ('train', ))
    assert report.findings.problems == []
    (code, _, text), = report.findings.notes
    assert code == 'unchecked' and 'images were not read' in text
    # The label maps are read nevertheless.
    assert sum(report.histograms['train_dataloader.dataset']
               .samples.values()) > 0
    data.files('annotations/training/*.png')[0].write_bytes(b'')
    assert codes(check_data(data.cfg, ('train', ))) == {'empty-file'}


def test_maps_of_another_loader(make):
    data = make('mmseg')
    data.train.pipeline[1] = dict(type='LoadBiomedicalAnnotation')
    for path in data.files('annotations/training/*.png'):
        path.write_bytes(b'x')
    report = check_data(data.cfg, ('train', ))
    assert report.findings.problems == []
    (code, _, text), = report.findings.notes
    assert code == 'unchecked' and 'label maps were not read' in text


@pytest.mark.parametrize('host', ['mmdet', 'mmpretrain'])
def test_other_hosts(host, make):
    data = make(host)
    data.train.pipeline[0].imdecode_backend = 'tifffile'
    for path in data.files('train*/**/*.jpg'):
        path.write_bytes(b'x')
    report = check_data(data.cfg, ('train', ))
    assert report.findings.problems == []
    assert [note[0] for note in report.findings.notes] == ['unchecked']
    # What is listed is counted all the same.
    assert report.histograms['train_dataloader.dataset'].total >= 10
