"""What `train.py` stands on: the options of a run, its devices, and the records that it keeps."""
