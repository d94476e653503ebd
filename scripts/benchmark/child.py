"""The process of one worker: python -m benchmark.child MODULE.CLASS '[ARGUMENT, ...]'

It makes the worker once. Then each line of JSON on standard input is a call, and one line of JSON answers it.
"""

import json
import os
import sys
import time
from importlib import import_module


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    module, name = sys.argv[1].split(".")
    worker = getattr(import_module(f"benchmark.{module}"), name)(*json.loads(sys.argv[2]))
    print("null", file=answers)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        cpu = time.process_time()
        result = getattr(worker, method)(*arguments)
        print(json.dumps([result, time.process_time() - cpu]), file=answers)


if __name__ == "__main__":
    main()
