"""params.yaml: every knob that can change a result, one section per rule, a module per section.

`load` reads and validates the whole file and reports every error in it at once; `section` gives one rule its own part.
"""

from slmake.params.adapter import Adapter
from slmake.params.all import RULES, All
from slmake.params.base import Section
from slmake.params.errors import Loader, dumped
from slmake.params.evaluate import Evaluate
from slmake.params.fetch_model import FetchModel
from slmake.params.finetune import Finetune
from slmake.params.gates import PARITY, PER_CLASS, TIMINGS, Gate, Gates
from slmake.params.load import Params, as_json, load, section, sums
from slmake.params.merge import Merge
from slmake.params.package import Package
from slmake.params.prepare import Files, Message, Prepare
from slmake.params.publish import Publish
from slmake.params.quantize import Quantize, Search
from slmake.params.rehearse import Rehearse
from slmake.params.report import Report

__all__ = [
    "PARITY",
    "PER_CLASS",
    "RULES",
    "TIMINGS",
    "Adapter",
    "All",
    "Evaluate",
    "FetchModel",
    "Files",
    "Finetune",
    "Gate",
    "Gates",
    "Loader",
    "Merge",
    "Message",
    "Package",
    "Params",
    "Prepare",
    "Publish",
    "Quantize",
    "Rehearse",
    "Report",
    "Search",
    "Section",
    "as_json",
    "dumped",
    "load",
    "section",
    "sums",
]
