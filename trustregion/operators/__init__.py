"""Symmetric linear maps on flat vectors."""

from .base import DenseOperator as DenseOperator
from .base import FunctionOperator as FunctionOperator
from .base import Identity as Identity
from .base import LinearOperator as LinearOperator
from .base import as_operator as as_operator
from .base import check_symmetric as check_symmetric
from .base import to_dense as to_dense
from .fisher import FisherOperator as FisherOperator
from .hessian import KLHessianOperator as KLHessianOperator
from .map import DenseMap as DenseMap
from .map import FunctionMap as FunctionMap
from .map import LinearMap as LinearMap
from .root import FisherRoot as FisherRoot
