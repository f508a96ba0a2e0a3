"""Containment: the answer stands somewhere in the prediction, as whole words.

For questions whose answer nothing but knowledge brings there, asked of models that have learned no form to answer in:
what `exact_match` calls format drift is right here, so that a score tells what is known, whatever form was learned.
"""

from dymoe.tasks.scoring.exact_match import lenient, readable

strict = lenient

__all__ = ["lenient", "readable", "strict"]
