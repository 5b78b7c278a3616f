"""Labels of the bibliography: authors and year, the same in the text and in the list, with a letter where two agree."""
from collections import Counter
from string import ascii_lowercase

from pybtex.plugin import register_plugin
from pybtex.style.formatting.unsrt import Style as Unsorted
from pybtex.style.labels import BaseLabelStyle


def name(entry):
    """Who wrote it: one name, two, or the first of more."""
    names = [" ".join([*person.prelast_names, *person.last_names]) for person in entry.persons["author"]]
    who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
    return f"{who} {entry.fields['year']}".replace("{", "").replace("}", "")


class Labels(BaseLabelStyle):
    def format_labels(self, entries):
        names = [name(entry) for entry in entries]
        often, seen = Counter(names), Counter()
        for own in names:
            yield own + ascii_lowercase[seen[own]] * (often[own] > 1)
            seen[own] += 1


class Style(Unsorted):
    default_label_style = Labels
    default_sorting_style = "author_year_title"


def setup(app):
    register_plugin("pybtex.style.formatting", "authors", Style)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
