"""The page of `vqvae demo`: what a tokenizer and its prior do, to be clicked at.

uploads.py   files that somebody dropped, read and checked
coded.py     a picture of any size as codes, and what each code and pixel costs
maps.py      pictures of codes, of bits and of differences
codebook.py  what each code looks like, and how often it is used
service.py   what the page can do, without the page
page.py      the page, by Gradio (extra `demo`), and the same functions for gradio_client
"""
