"""The distillation algorithms, one file each beside its equations."""

from distill.methods.denoise import Denoise
from distill.methods.dmd2 import DMD2
from distill.methods.lcd import LCD
from distill.methods.regression import Regression
from distill.methods.scm import SCM
from distill.methods.sid import SiD
from distill.methods.sida import SiDA
from distill.methods.vsd import VSD

__all__ = ["DMD2", "Denoise", "LCD", "Regression", "SCM", "SiD", "SiDA", "VSD"]
