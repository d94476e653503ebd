"""The supported Hugging Face families, a record each; Family says what such a record holds."""

from collections.abc import Mapping

from llama_mini.checkpoint.families.elsewhere import ELSEWHERE
from llama_mini.checkpoint.families.family import Family
from llama_mini.checkpoint.families.pre import PRE
from llama_mini.checkpoint.keys import KeyTable

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (*PRE, *ELSEWHERE)}
OWN = "llama_mini"  # the model_type of a model that no family describes; it is saved under our own names
KNOWN = (*FAMILIES, OWN)
# Models of images and text whose text part, in `text_config`, is a family and computes text as that does alone.
WHOLES: tuple[str, ...] = ("exaone4_5", "gemma3", "got_ocr2", "idefics3", "internvl", "lighton_ocr", "llava")
WHOLES += ("llava_next", "llava_onevision", "mistral3", "smolvlm", "vipllava")


def has_interleaved_pairs(model_type: str) -> bool:
    """Whether rotary pairs lie side by side in the family's files."""
    return model_type != OWN and FAMILIES[model_type].interleaved


def key_table(model_type: str) -> KeyTable:
    return {} if model_type == OWN else FAMILIES[model_type].keys
