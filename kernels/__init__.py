"""How keys and values are stored, written and attended to: no word of graphs or models.

Where Python runs in this repository's folder, it also finds this package as plain `kernels`, a name that is Hugging
Face's. transformers looks for theirs. It is handed over where it is installed; where it is not, version 0 says that
this is none that could serve.
"""

__version__ = "0"


def _hand_over(name: str) -> None:
    """Import the package `name` from wherever else it is installed, and put it in this one's place."""
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    here = Path(__file__).parents[1].resolve()
    spec = PathFinder.find_spec(name, [folder for folder in sys.path if Path(folder).resolve() != here])
    if spec is None or spec.loader is None:
        return
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


if __name__ == "kernels":
    _hand_over(__name__)
