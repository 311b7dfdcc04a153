"""Sessions of ONNX Runtime; the service's only door to that library."""

import onnxruntime as ort

from model.contract.errors import BundleCorrupt

# It computes functions such as the sigmoid for four rows at a time, and those left over at the end
# in another way, with other last bits.
ROW_MULTIPLE = 4


def open_session(model: bytes, *, name: str, intra_op_threads: int) -> ort.InferenceSession:
    """Builds a session; seconds for a large model. Its `run` may be called from any thread.

    Args:
        model: An ONNX file's content.
        name: The file's, for errors.
        intra_op_threads: Threads inside one run.

    Raises:
        BundleCorrupt: ONNX Runtime cannot load the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Spinning threads win microseconds on an idle machine and lose milliseconds on a busy one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # the library's errors share no base class but this one
        raise BundleCorrupt(f"{name}: {first_line(exc)}", where=name) from exc


def first_line(exc: Exception) -> str:
    """What an error of the library says, shortened."""
    return str(exc).partition("\n")[0][:200]
