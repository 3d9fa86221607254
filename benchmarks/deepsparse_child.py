"""An ONNX file in DeepSparse, which wants a Python and packages of its own: called over pipes.

    python benchmarks/deepsparse_child.py MODEL.onnx INPUT.npy OUTPUT.npy THREADS

Writes the output of one run, then a line; afterwards each line that it reads is one run, answered by a line.
"""

import sys

import numpy as np
from deepsparse import compile_model


def main() -> None:
    path, x, out, threads = sys.argv[1:]
    engine = compile_model(path, batch_size=1, num_cores=int(threads))
    inputs = [np.load(x)]
    np.save(out, engine.run(inputs)[0])
    print("ready", flush=True)
    for _ in sys.stdin:
        engine.run(inputs)
        print("done", flush=True)


if __name__ == "__main__":
    main()
