"""One file for each source of images; its function gives the splits, images of (channels, size, size).

Its arguments are the knobs of the same names in conf/dataset/, which says what they are. Where the images are not
there, not all there, not these or not readable, or cannot be downloaded, it raises a UserError.
"""

_CIFAR = "none is stated; the authors of CIFAR-100 ask that Krizhevsky 2009 is cited"
_IMAGENET = "ImageNet's terms, for non-commercial research and education"
# Under which the images are published, by dataset.name; a model's card says it.
LICENCES = {
    "omniglot": "MIT, Brenden Lake 2015",
    "cifarfs": _CIFAR,
    "fc100": _CIFAR,
    "miniimagenet": _IMAGENET,
    "tieredimagenet": _IMAGENET,
    "cub": "not known; the photos are of Flickr's users",
    "minicub": f"{_IMAGENET}; those of CUB are not known",
    "aircraft": "the photographers', for non-commercial research alone",
    "flowers": "not known",
    "dtd": "not known",
    "glyphs": "drawn by this program from the fonts that matplotlib ships",
}
