"""What `train.py` stands on: the options of a run, and the records that it keeps."""
