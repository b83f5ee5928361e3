"""Programs that JAX has traced (jaxprs): walks through them, evaluates them with operations replaced, and splits them.

This is the only place in metaopt that uses the semi-public parts of JAX: `jax.core`, `jax.custom_derivatives`,
`jax.extend.core` and `jax.interpreters`. Other subpackages import the names that they need from here.
"""

from jax.core import Tracer as Tracer
from jax.core import eval_jaxpr as eval_jaxpr
from jax.custom_derivatives import SymbolicZero as SymbolicZero
from jax.extend.core import Jaxpr as Jaxpr
from jax.extend.core import Literal as Literal
from jax.extend.core import jaxpr_as_fun as jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr as dce_jaxpr

from metaopt._jaxpr._dependencies import dependencies as dependencies
from metaopt._jaxpr._dependencies import sources_through as sources_through
from metaopt._jaxpr._dependencies import until_fixed as until_fixed
from metaopt._jaxpr._derivatives import refuse_derivative as refuse_derivative
from metaopt._jaxpr._derivatives import used_leaves as used_leaves
from metaopt._jaxpr._evaluate import evaluate as evaluate
from metaopt._jaxpr._evaluate import exchange as exchange
from metaopt._jaxpr._float64 import in_float64 as in_float64
from metaopt._jaxpr._primitives import bilinear_primitive as bilinear_primitive
from metaopt._jaxpr._split import Halves as Halves
from metaopt._jaxpr._split import split as split
from metaopt._jaxpr._walk import equations as equations
from metaopt._jaxpr._walk import equations_inside as equations_inside
from metaopt._jaxpr._walk import inner_jaxprs as inner_jaxprs
