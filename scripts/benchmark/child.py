"""One worker in a process of its own: it is made once, then answers each call with a line of JSON.

python -m benchmark.child MODULE.CLASS '[ARGUMENT, ...]'
"""

import json
import os
import sys
import time
from importlib import import_module


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print what they like
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
