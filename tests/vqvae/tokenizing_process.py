"""A process that tokenizes again and again, as a pipe tells it; see test_tokens_jobs.py.

python tokenizing_process.py SOURCE < lines of: seconds to wait, a folder

It answers each line by `done`, with how many images it encoded, or by what it was refused with.
"""

import sys
import time

from token_worlds import tokenize, tokenizer

from vqvae.data import load_images

if __name__ == "__main__":
    model, images = tokenizer(), load_images(sys.argv[1], size=8)
    print("ready", flush=True)
    for line in sys.stdin:
        pause, folder = line.rstrip("\n").split(" ", 1)
        time.sleep(float(pause))
        try:
            made = tokenize(model, images, folder, batch_size=4, shard_size=9)
            print("done" if made.whole else "not whole", made.num_images, flush=True)
        except ValueError as error:
            print(str(error), flush=True)
