"""mkdocstrings calls this: examples in docstrings are shown as code."""

import re

import griffe


class Examples(griffe.Extension):
    """Makes of a section "Example:", and of an example without a section, what griffe knows."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(
                r"^>>> .*?(?=\n\n|\Z)", r"```pycon\n\g<0>\n```", text, flags=re.MULTILINE | re.DOTALL
            )
