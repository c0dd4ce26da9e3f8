"""Broken files of images."""

from PIL import Image
from png_header import header_only

from .registry import case


def first_image(data):
    return data.files('train2017/*.jpg')[0]


@case('mmdet', 'missing-image', '000000000001.jpg (image 1)')
def image_deleted(data):
    first_image(data).unlink()


@case('mmdet', 'empty-file', '000000000001.jpg')
def image_of_no_bytes(data):
    first_image(data).write_bytes(b'')


@case('mmdet', 'truncated-file', '000000000001.jpg')
def image_cut_short(data):
    content = first_image(data).read_bytes()
    first_image(data).write_bytes(content[:len(content) * 2 // 3])


@case('mmdet', 'not-an-image', '000000000001.jpg')
def text_with_the_name_of_an_image(data):
    first_image(data).write_text('<html>404 Not Found</html>')


@case('mmdet', 'not-an-image', '000000000001.jpg')
def folder_with_the_name_of_an_image(data):
    path = first_image(data)
    path.unlink()
    path.mkdir()


@case('mmdet', 'image-size', '48x48, annotated as 48x60')
def image_cut_after_annotation(data):
    data.coco['images'][0]['height'] = 60


@case('mmdet', 'image-size', '40x48, annotated as 48x40')
def image_turned_by_exif(data):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn: OpenCV and mmcv follow it
    Image.new('RGB', (48, 40)).save(first_image(data), exif=exif)
    data.coco['images'][0]['height'] = 40
    number = data.coco['images'][0]['id']
    for entry in data.coco['annotations']:
        if entry['image_id'] == number:  # inside of both
            entry.update(bbox=[4, 4, 30, 30],
                         segmentation=[[4, 4, 34, 4, 34, 34]])


@case('mmdet', 'not-an-image', 'OpenCV does not read this PCX file')
def image_of_a_format_that_opencv_lacks(data):
    Image.new('RGB', (48, 48)).save(first_image(data), format='PCX')


@case('mmdet', 'missing-image', '000000000001.jpg (image 1)')
def all_images_deleted_and_none_to_take_instead(data):
    data.train.pipeline[0].ignore_empty = True
    for path in data.files('train2017/*.jpg'):
        path.unlink()


@case('mmseg', 'empty-file', 'ADE_val_00000001.jpg')
def image_of_no_bytes_in_a_validation(data):
    for split in ('val', 'test'):
        dataset = data.cfg[f'{split}_dataloader'].dataset
        dataset.pipeline[0].ignore_empty = True
    data.files('images/validation/*.jpg')[0].write_bytes(b'')


@case('mmdet', 'too-large', '000000000001.jpg')
def image_of_more_pixels_than_opencv_takes(data):
    header_only(first_image(data), 2**15 + 1, 2**15)
