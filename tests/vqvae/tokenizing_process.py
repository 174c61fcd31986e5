"""A process that tokenizes again and again, as a pipe tells it; see `token_worlds.process`.

python tokenizing_process.py SOURCE < lines of: seconds to wait, a folder

It answers each line by `done`, or by what it was refused with.
"""

import sys
import time
from pathlib import Path

from token_worlds import loaded, tokenize

if __name__ == "__main__":
    images = loaded(Path(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        pause, folder = line.rstrip("\n").split(" ", 1)
        time.sleep(float(pause))
        try:
            print("done" if tokenize(images, Path(folder)).whole else "not whole", flush=True)
        except ValueError as error:
            print(str(error), flush=True)
