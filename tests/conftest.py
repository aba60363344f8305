"""What every test runs under."""

import os
import signal

# One thread in every process, before torch is imported: so sums come out the same in all of them.
os.environ["OMP_NUM_THREADS"] = "1"
# All of Ray stays on 127.0.0.1. Ray reads this when it is first imported, which may be long before a test of Ray's.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
# No model hub either: nobody listens there. A test of hubs gives the address of its own.
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")
# A shell that starts a command in the background has it ignore Ctrl-C, and all that it starts; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
