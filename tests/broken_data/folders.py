"""Broken folders of classes, and lists of files."""

import shutil

from .registry import case


def first_of_class(data):
    return data.files('train/cross/*.jpg')[0]


@case('mmpretrain', 'truncated-file', 'train_00000001.jpg')
def photo_cut_short(data):
    first_of_class(data).write_bytes(first_of_class(data).read_bytes()[:-80])


@case('mmpretrain', 'not-an-image', 'train_00000001.jpg')
def photo_that_is_an_archive(data):
    first_of_class(data).write_bytes(b'PK\x03\x04' * 50)


@case('mmpretrain', 'empty-class-folder', 'train/cross')
def class_without_images(data):
    for path in data.files('train/cross/*.jpg'):
        path.unlink()


@case('mmpretrain', 'hidden-folder', '.ipynb_checkpoints')
def leftovers_of_a_notebook(data):
    (data.root / 'train/.ipynb_checkpoints').mkdir()


@case('mmpretrain', 'class-folders', 'has 6 folders')
def one_folder_too_many(data):
    shutil.copytree(data.root / 'train/star', data.root / 'train/stern')


@case('mmpretrain', 'class-order', "class 0 is 'triangle'")
def classes_in_another_order(data):
    data.train.metainfo.classes = data.train.metainfo.classes[::-1]


@case('mmpretrain', 'class-order', "sorted folder 3 is 'stern'")
def folder_under_another_name(data):
    (data.root / 'train/star').rename(data.root / 'train/stern')


def use_list(data, *lines: str) -> None:
    (data.root / 'list.txt').write_text('\n'.join(lines) + '\n')
    data.train.ann_file = 'list.txt'


@case('mmpretrain', 'list-line', "list.txt:2: 'cross/train_00000006.jpg'")
def line_without_a_label(data):
    use_list(data, 'cross/train_00000001.jpg 0', 'cross/train_00000006.jpg')


@case('mmpretrain', 'list-label', 'list.txt:2: label 5')
def labels_counted_from_one(data):
    use_list(data, 'cross/train_00000001.jpg 1',
             'triangle/train_00000005.jpg 5')


@case('mmpretrain', 'missing-image', 'cross/train_9.jpg')
def line_of_no_file(data):
    use_list(data, 'cross/train_00000001.jpg 0', 'cross/train_9.jpg 0')


@case('mmpretrain', 'no-images', 'list.txt: lists no image')
def list_of_nothing(data):
    (data.root / 'list.txt').write_text('')
    data.train.ann_file = 'list.txt'


@case('mmpretrain', 'no-images', 'the images cannot be listed')
def list_in_latin_1(data):
    (data.root / 'list.txt').write_bytes(b'\xe9.jpg 0\n')
    data.train.ann_file = 'list.txt'


@case('mmpretrain', 'num-classes', 'head.num_classes=1000')
def head_of_imagenet(data):
    data.cfg.model.head.num_classes = 1000
