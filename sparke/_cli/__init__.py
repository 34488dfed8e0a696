"""The commands of `sparke`; needs the extra ``sparke[demo]``."""
