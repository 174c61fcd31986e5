"""Encoders and decoders, and the blocks that they are made of: of pixels to features, and back.

encoder.py, decoder.py    residual convolutions, ours
vqgan.py                  those of the public tokenizers (Esser et al. 2021)
blocks.py                 what ours are made of
"""
