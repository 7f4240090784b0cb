"""The second way for the bytes of blobs: pieces over TLS 1.3 by Python's ``ssl``, which costs half of gRPC's CPU time.

Optional on both sides: a peer whose bulk port is not reached is served, and asked, by gRPC as ever.
"""
