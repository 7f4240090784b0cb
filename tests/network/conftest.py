"""gRPC's C core prints what the tests provoke; the tests look at what the code under test says."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
