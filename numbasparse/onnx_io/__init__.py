"""ONNX files in and out: convolutional nets as ordinary torch modules, and pruned weights as sparse initializers.

The room is not called ``onnx`` so that it never hides the package of that name.  It needs the extra:
``pip install 'numbasparse[onnx]'``.
"""

from numbasparse.onnx_io.fallback import OnnxRuntimeModel
from numbasparse.onnx_io.importer import Imported, import_onnx, load_onnx
from numbasparse.onnx_io.program import export_program
from numbasparse.onnx_io.source import UnsupportedOnnxError
from numbasparse.onnx_io.sparse import StoredWeight, save_onnx_sparse

__all__ = [
    "Imported",
    "OnnxRuntimeModel",
    "StoredWeight",
    "UnsupportedOnnxError",
    "export_program",
    "import_onnx",
    "load_onnx",
    "save_onnx_sparse",
]
