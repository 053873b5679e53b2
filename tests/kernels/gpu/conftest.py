"""Makes Triton's interpreter faster. Nothing that it computes changes."""

import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    launch, replace_language = interpreter.GridExecutor.__call__, interpreter._patch_lang
    replaced = set[str]()

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> Any:
        replaced.clear()
        return launch(self, *arguments, **options)

    def replace_language_once(function: Any) -> Any:
        """At each call of one function by another Triton would replace all of the language that its module sees."""
        if function.__module__ in replaced:
            return None
        replaced.add(function.__module__)
        return replace_language(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_anew, replace_language_once
