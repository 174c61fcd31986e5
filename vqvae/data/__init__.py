"""Images in: 8-bit, of one shape, in batches.

    images = load_images("fashion-mini")                        # an `Images` set
    images[:8].images                                           # of a `Batch`
    for batch in batches(images, 64, seed=0):                   # without end; a `Batch` each
        batch.images                                            # uint8 "b c h w"
    batches(images, 64, seed=0, augment=Augment(flip=True))     # varied, anew in each epoch

    load.py       one name or path to a set
    images.py     what a set is: Images, ImageTensors, EncodedImages
    batch.py      images with their labels: Batch
    labels.py     what labels come to, and why they are not used
    splits.py     what a folder holds, and which of it is for test
    builtin.py    sets known by name
    folder.py     image files in a folder
    own_sizes.py    the images of a set as large as they are, those of equal size together
    tars.py       WebDataset archives
    tar_index.py, tar_members.py        where their images and labels lie
    table.py      parquet and Hugging Face (extra `parquet`; imported only when needed)
    table_parts.py, table_columns.py, table_rows.py     their files, columns and rows
    decoding.py   one encoded image to uint8
    views.py      a part of a picture, turned and mirrored, at an image's size
    augmentation.py   which part, by (seed, epoch, image): Augment
    transformed.py    images through a transform of torchvision's, or any
    cache.py      shrunk copies of large images on the disk
    survey.py     what a set holds at a glance, and pictures that are in two sets
    png.py        whether a PNG is whole
    files.py      regular files, and all that are in a folder
    batching.py   order, sharding, workers
    permutation.py  a shuffle of any number of things, without memory

Stands alone: it knows nothing of models.
"""

from vqvae.data.augmentation import Augment
from vqvae.data.batch import Batch
from vqvae.data.batching import batches
from vqvae.data.images import Images, ImageTensors
from vqvae.data.load import load_images

__all__ = [
    "Augment",
    "Batch",
    "ImageTensors",
    "Images",
    "batches",
    "load_images",
]
