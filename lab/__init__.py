"""How a run works: the Lab, the training loop, settings and reports.

Nobody has to read this folder to change a paper. From Python:

    from lab import Lab, Settings

    lab = Lab(Settings(world="reviews"))
"""

from lab.lab import Lab
from lab.settings import Settings

__all__ = ["Lab", "Settings"]
