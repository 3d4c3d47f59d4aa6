"""Fine-tune with every weight of a matrix product on the fp16 lattice; activations stay float.

The neighbour of int8_tp4.py in which the grid is a cast: what is lost by 16-bit floats, measured the same way.

    Command:  python scripts/finetune.py --config configs/fp16_tp4.py
    Hardware: four CPU devices simulated on two cores, or four real ones
    Result:   macro-F1 0.408 (foundation) → 0.926, its fp16 export the same
"""

from research.config import Experiment, MeshConfig, Rule


def get_config() -> Experiment:
    """Return the experiment: what differs from the defaults."""
    return Experiment(
        mesh=MeshConfig(tensor=4),
        quantization=(Rule(match="layers/(attention|mlp)/.*|(embed|head)/table_vd", weight="fp16"),),
    )
