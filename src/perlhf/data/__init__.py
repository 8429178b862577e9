"""Reading human feedback: files and published formats to records, records to splits.

`perlhf.data.tools` has what `perlhf data` does with them, `perlhf.data.pull` fetches published sets.
"""

from perlhf.data.files import BUILTIN
from perlhf.data.readers import read
from perlhf.data.records import Comparison, Demonstration, Message, Prompt, Rating, Record, Text
from perlhf.data.split import check_labels, content_hash, load, split_of

__all__ = [
    "BUILTIN",
    "Comparison",
    "Demonstration",
    "Message",
    "Prompt",
    "Rating",
    "Record",
    "Text",
    "check_labels",
    "content_hash",
    "load",
    "read",
    "split_of",
]
