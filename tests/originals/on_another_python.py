"""Compute fingerprints of sources and of functions in files. Runs under any Python from 3.10 on, without packages."""

import importlib.util
import json
import sys
import warnings


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def function_in(name, path):
    try:
        return load(name, path).f
    except SyntaxError:
        return None


if __name__ == "__main__":
    warnings.simplefilter("ignore", SyntaxWarning)
    sys.dont_write_bytecode = True
    request = json.load(sys.stdin)
    module = load("attnzoo_fingerprint", request["module"])
    functions = {name: function_in(name, path) for name, path in request["files"].items()}
    answer = {
        "sources": {name: module.fingerprint_of_source(text) for name, text in request["sources"].items()},
        "files": {name: f and module.fingerprint(f) for name, f in functions.items()},
    }
    json.dump(answer, sys.stdout)
