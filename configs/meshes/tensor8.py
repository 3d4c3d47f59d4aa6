"""A tiny random Llama learns fruit from tools on the mesh tensor=8, w8a8: a mesh to try things on.

Command:  python scripts/finetune.py --config configs/meshes/tensor8.py
Hardware: eight CPU devices simulated on two cores, or eight real ones
Result:   loss 3.076 after ten steps; 12 s on two shared cores
"""

from research.config import EvaluationConfig, Experiment, MeshConfig, OptimizerConfig, Rule, TaskConfig, TrainConfig


def get_config() -> Experiment:
    """Return the experiment: what differs from the defaults."""
    return Experiment(
        foundation="tests/fixtures/mha",
        task=TaskConfig(name="own_data", path="configs/meshes/shed.jsonl", lengths=(64,), prompt="{text}", chat=False),
        mesh=MeshConfig(tensor=8),
        quantization=(Rule(match="layers/(attention|mlp)/.*|embed/table_vd", weight="int8", activation="int8"),),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        train=TrainConfig(steps=10, accumulate=1),
        evaluation=EvaluationConfig(bootstrap_samples=200),
    )
