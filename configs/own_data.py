"""Fine-tune on your own texts and labels: a .jsonl file, or a .csv file with a header line.

A line of JSONL looks like {"text": "where is my parcel?", "label": "delivery"}, a CSV file starts with text,label.
To adapt it, copy this file and change `path` and the names of the two columns; or override them, e.g.
--config.task.path=tickets.csv --config.task.label_column=queue. The prompt lists your labels unless `prompt` says
something else; {text} in it stands for the text. Splits are made by hash, duplicates across them are removed.

    Command:  python scripts/finetune.py --config configs/own_data.py --config.task.path=FILE
    Hardware: four CPU devices simulated on two cores, or four real ones
    Result:   yours
"""

from research.config import Experiment, MeshConfig, Rule, TaskConfig


def get_config() -> Experiment:
    """Return the experiment: what differs from the defaults."""
    return Experiment(
        task=TaskConfig(name="own_data", path="my_data.jsonl", text_column="text", label_column="label"),
        mesh=MeshConfig(tensor=4),
        quantization=(
            Rule(match="layers/(attention|mlp)/.*", weight="int8", activation="int8"),
            Rule(match="(embed|head)/table_vd", weight="int8", activation="int8"),
        ),
    )
