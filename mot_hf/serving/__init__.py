"""Guards around `transformers serve`."""

from mot_hf.serving.server import MAX_BODY_BYTES, guard_server

__all__ = ["MAX_BODY_BYTES", "guard_server"]
