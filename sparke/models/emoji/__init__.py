"""A small text-to-image model of emoji, and a judge that names the mode of each picture.

    >>> from sparke.models import emoji
    >>> model = emoji.load()
    >>> embeds = model.encode(["dog face", "princess tone:dark"])

The artwork it was trained on, its authors and licences are in the file ``NOTICE`` beside this one.
"""

from sparke.models.emoji.judge import Judge, Verdict, load_judge
from sparke.models.emoji.model import EmojiModel, load
from sparke.models.emoji.pipeline import pipeline
from sparke.models.emoji.prompts import UnknownWords, Vocabulary

__all__ = [
    "EVALUATION_PROMPTS",
    "EmojiModel",
    "Judge",
    "UnknownWords",
    "Verdict",
    "Vocabulary",
    "load",
    "load_judge",
    "pipeline",
]

EVALUATION_PROMPTS = (
    # Drawn in several skin tones,
    "woman health worker",
    "man firefighter",
    "princess",
    "waving hand",
    "man astronaut",
    "santa claus",
    "thumbs up",
    "old woman",
    # and not.
    "dog face",
    "octopus",
    "pizza",
    "house",
    "automobile",
    "red apple",
    "rocket",
    "tulip",
)
"""Sixteen prompts that our own figures are measured on, one half with skin tones."""
