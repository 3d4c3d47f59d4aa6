"""Number formats and the optimizer that lands on them. Needs jax and optax only; models of any library will do."""

from research.config import Rule as Rule
from research.quant.averaging import average_of as average_of
from research.quant.averaging import average_params as average_params
from research.quant.nodes import Encoded as Encoded
from research.quant.nodes import Quantized as Quantized
from research.quant.optimizer import apply_updates as apply_updates
from research.quant.optimizer import eval_params as eval_params
from research.quant.optimizer import is_on_grid as is_on_grid
from research.quant.optimizer import project as project
from research.quant.optimizer import quantize as quantize
from research.quant.optimizer import view as view
from research.quant.optimizer import with_latents as with_latents
from research.quant.policy import Leaf as Leaf
from research.quant.policy import Policy as Policy
from research.quant.state import QuantizeState as QuantizeState
from research.quant.state import export as export
from research.quant.state import latents as latents
from research.quant.state import oscillation as oscillation
from research.quant.state import with_input_scales as with_input_scales
