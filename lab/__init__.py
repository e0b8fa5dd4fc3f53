"""The machine room: how a run works. Nobody has to read it to change a paper.

from lab import Lab, Settings

lab = Lab(Settings(world="reviews"))
"""

from lab.lab import Lab
from lab.settings import Settings

__all__ = ["Lab", "Settings"]
