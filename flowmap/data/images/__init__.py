"""Data sets of pictures: folders, archives, labels and captions."""
