"""What the importer writes."""

import yaml

from slmake.olive import reader
from slmake.params import Params


def test_every_section_is_written():
    """DVC refuses to record a stage whose section is not in params.yaml."""
    content = yaml.safe_load(reader.as_yaml({"finetune": {"lora_r": 8}}))
    assert content == {"finetune": {"lora_r": 8}} | {name: {} for name in Params.model_fields if name != "finetune"}
