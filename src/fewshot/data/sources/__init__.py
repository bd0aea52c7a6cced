"""One file for each source of images; its function gives the splits, images of (channels, size, size).

Its arguments are the knobs of the same names in conf/dataset/, which says what they are. Where the images are not
there, not all there, not these or not readable, or cannot be downloaded, it raises a UserError.
"""
