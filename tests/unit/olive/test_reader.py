"""What the importer writes."""

import yaml

from slmake.olive import reader
from slmake.params import Params


def test_every_section_is_written():
    """DVC refuses to record a stage whose section is not in params.yaml."""
    content = yaml.safe_load(reader.as_yaml({"finetune": {"lora_r": 8}}))
    empty = {name: {} for name in Params.model_fields} | {"prepare": None}
    assert content == empty | {"finetune": {"lora_r": 8}}
