"""What the checks find: kinds with a fix each, counts, a few examples."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ..preflight import ConfigError

EXAMPLES = 5  # kept of each kind, so that memory is bounded


class DataError(ConfigError):
    """Data that cannot give the training its user wants."""


class Kind(NamedTuple):
    """A kind of mistake.

    Attributes:
        meaning (str): What is wrong.
        fix (str): What to do, one sentence.
    """

    meaning: str
    fix: str


# What the hosts pass over without a word is said here.
PROBLEMS = {
    # of the config, found by mmrpa.preflight with a fix in each example
    'missing-path': Kind(
        'a path of the config does not exist', 'put or link the data there'),
    'categories': Kind(
        'categories of the file and classes of the config differ',
        'give metainfo=dict(classes=...) the names in the file'),
    'num-classes': Kind(
        'a head has another number of classes than the dataset (a head for '
        'things of a panoptic model: than that has things)',
        'set num_classes of the head, or metainfo.classes'),
    'class-names': Kind(
        'the class names cannot be used',
        'give metainfo=dict(classes=...) the names, as a tuple'),
    'class-folders': Kind(
        'the folders are more or fewer than the classes',
        'remove or add folders, or correct metainfo.classes'),
    'dataset-arguments': Kind(
        'the dataset does not accept its arguments',
        'correct the dataset in the config'),
    'auto-scale-lr': Kind(
        'the batch or its base_batch_size is no positive number',
        'correct auto_scale_lr, batch_size or accumulative_counts'),
    # of files
    'no-images': Kind(
        'the dataset has no images',
        'correct the folder, the suffixes or the annotation file'),
    'missing-image': Kind(
        'an image is listed and not there',
        'restore the file, correct the prefix, or take it from the list'),
    'empty-file': Kind(
        'a file of 0 bytes', 'copy or download it again'),
    'truncated-file': Kind(
        'an image that ends early or is damaged: OpenCV gives nothing for a '
        'JPEG cut short, and the training stops when it comes to it',
        'copy or download it again'),
    'not-an-image': Kind(
        'a file with the name of an image that is none',
        'remove it, or convert it'),
    'too-large': Kind(
        'an image of more pixels than its decoder takes: 2^30 for OpenCV, '
        '178956970 for Pillow, which reads label maps by default',
        "cut it into tiles, or read label maps with imdecode_backend='cv2'"),
    'unreadable-file': Kind(
        'a file that the system refuses to read',
        'correct its permissions, or copy it from a disk that is sound'),
    # of COCO files
    'annotation-file': Kind(
        'the annotation file cannot be understood',
        'write or download it again, in the format of COCO'),
    'image-entry': Kind(
        "an entry of 'images' lacks a field or has one of a wrong type",
        'give it id (integer), file_name, width and height (pixels)'),
    'annotation-entry': Kind(
        "an entry of 'annotations' lacks a field or has one of a wrong type",
        'give it id, image_id, category_id (integers), bbox ([x, y, w, h] in '
        'pixels), area and iscrowd (0 or 1)'),
    'duplicate-image-id': Kind(
        'two images with the same id: one of them is lost',
        'number the images anew'),
    'duplicate-annotation-id': Kind(
        'two annotations with the same id: mmdet stops with an assertion, '
        'or one of them is counted twice and the other is lost',
        'number the annotations anew'),
    'duplicate-category': Kind(
        'two categories with the same id or name',
        'give each category an id and a name of its own'),
    'unknown-image': Kind(
        'an annotation of an image that is not listed: it is dropped without '
        'a word', 'list the image, or remove the annotation'),
    'unknown-category': Kind(
        'an annotation of a category that is not listed: it is dropped '
        'without a word', 'list the category, or correct the id'),
    'image-size': Kind(
        'the width and height in the file differ from the image: boxes are '
        'clipped at the wrong place, masks have the wrong size',
        'write the size of the image as it is decoded, after its EXIF '
        'orientation'),
    'not-finite': Kind(
        'a number that is NaN or infinite: so is the loss',
        'correct or remove the annotation'),
    'box-empty': Kind(
        'a box without width or height: mmdet drops it without a word',
        'correct or remove it; a box is [x, y, width, height]'),
    'box-outside': Kind(
        'a box that reaches out of its image by more than a pixel',
        'clip it; a box is [x, y, width, height], not two corners'),
    'area-empty': Kind(
        'an area of 0 or less: mmdet drops the annotation without a word',
        'write the area of the mask, or of the box'),
    'polygon-short': Kind(
        'a polygon of fewer than 3 points: mmdet drops it without a word',
        'remove it, or give the annotation its true outline'),
    'polygon-odd': Kind(
        'a polygon with an odd number of coordinates: mmdet drops it '
        'without a word', 'write x and y of each point'),
    'rle-malformed': Kind(
        'a run-length encoding that cannot be decoded',
        'encode the mask again with pycocotools, at the size of its image'),
    'mask-missing': Kind(
        'an annotation without a segmentation, though the pipeline loads '
        'masks', 'add it, or train without masks'),
    'mask-ignored': Kind(
        'a run-length mask of an object, and LoadAnnotations has '
        'poly2mask=False: mmdet ignores the object without a word',
        'set poly2mask=True, or write the mask as polygons'),
    # of label maps
    'missing-label-map': Kind(
        'an image without its label map',
        'add the file, or correct seg_map_path and seg_map_suffix'),
    'label-map-size': Kind(
        'a label map of another size than its image',
        'write it at the size of its image'),
    'label-map-rgb': Kind(
        'a label map with colours and not with class numbers',
        'convert the colours to numbers, as an 8-bit PNG of one channel'),
    'label-map-lossy': Kind(
        'a label map as a JPEG, which blurs the numbers',
        'write it as PNG from its source'),
    'label-range': Kind(
        'a label that is no class and not ignored: an error on a CPU, a '
        'device-side assert on a GPU, another class, or a wrong metric',
        'correct the labels, or add the classes; ignored is the ignore_index '
        'of each head (255 by default), in a validation that of the metric'),
    'label-map-binary': Kind(
        'label maps of black and white, 0 and 255, for two classes: 255 is '
        'ignored, so the second class is never learned',
        'write 1 for 255, as with labels // 255'),
    'reduce-zero-label': Kind(
        'reduce_zero_label does not fit the labels',
        'reduce_zero_label=True is for labels 1 to n where 0 is ignored, '
        'False for 0 to n-1'),
    # of folders
    'empty-class-folder': Kind(
        'the folder of a class has no images',
        'fill the folder, or remove it and the class'),
    'class-order': Kind(
        'the folders of the classes in another order, or under other names, '
        'than metainfo.classes: labels follow the sorted folders, so the '
        'names would be mixed up',
        'list the classes as the sorted folders are'),
    'hidden-folder': Kind(
        'a hidden folder, which mmpretrain takes for a class: all labels '
        'after it shift', 'remove it'),
    'list-line': Kind(
        "a line of the list that is not 'PATH LABEL'",
        'write the path, a blank and the number of the class'),
    'list-label': Kind(
        'a label of the list that is the number of no class',
        'correct it, or metainfo.classes; classes count from 0'),
}

NOTES = {
    'config': 'what the checks of the config could not see',
    'unchecked': 'not checked',
    'sampled': 'checked in part',
    'batch': 'effective batch',
    'padding': 'a label of padding that a loss would stop at',
    'no-annotations': 'images without annotations',
    'crowd-only': 'images with crowd annotations only',
    'filtered-image': 'images that filter_cfg leaves out',
    'box-tiny': 'boxes of less than a pixel',
    'class-without-samples': 'classes without any sample',
    'skipped-file': 'files that the dataset does not read',
    'map-without-image': 'label maps that belong to no image',
    'duplicate-file': 'images that are listed twice',
}


@dataclass
class Group:
    """Findings of one kind in one dataset.

    Attributes:
        code (str): The kind, a key of :data:`PROBLEMS`.
        where (str): Dotted key of the dataset in the config.
        count (int): How many there are.
        examples (list[str]): The first ones.
    """

    code: str
    where: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


class Findings:
    """Collects problems and notes in memory that does not grow with them."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], Group] = {}
        self._notes: dict[tuple[str, str, str], None] = {}

    def add(self, code: str, where: str, example: str,
            count: int = 1) -> None:
        """Report a problem.

        Args:
            code (str): A key of :data:`PROBLEMS`.
            where (str): Dotted key of the dataset.
            example (str): File, id and what is wrong with it.
            count (int): How many it stands for.

        Raises:
            KeyError: If there is no such kind.
        """
        PROBLEMS[code]
        group = self._groups.setdefault((where, code), Group(code, where))
        group.count += count
        if len(group.examples) < EXAMPLES:
            # JSON can hold halves of characters, which no terminal prints.
            group.examples.append(
                example.encode('utf-8', 'backslashreplace').decode())

    def note(self, code: str, where: str, text: str) -> None:
        """Report what is no problem, once.

        Raises:
            KeyError: If ``code`` is not in :data:`NOTES`.
        """
        NOTES[code]
        self._notes[code, where, text] = None

    @property
    def problems(self) -> list[Group]:
        """All groups, in the order in which they were first found."""
        return list(self._groups.values())

    @property
    def notes(self) -> list[tuple[str, str, str]]:
        """(code, where, text) of all notes."""
        return list(self._notes)

    def lines(self) -> Iterator[str]:
        """The summary for a terminal: problems, then notes."""
        for group in self.problems:
            kind = PROBLEMS[group.code]
            yield (f'{group.code}: {group.count} x {kind.meaning} '
                   f'({group.where})')
            for example in group.examples:
                yield f'    {example}'
            if group.count > len(group.examples):
                yield f'    and {group.count - len(group.examples)} more'
            yield f'  fix: {kind.fix}'
        for code, where, text in self.notes:
            yield f'note ({code}): {text}' + (f' ({where})' if where else '')
