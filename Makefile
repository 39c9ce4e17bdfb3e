# The two commands: `make book` and `make test`. README.md has the same without make.
PYTHON ?= python3
BIN := .venv/bin
CURRENT := .venv-current/bin

.PHONY: book test refresh serve status seeds current

book: .venv/installed
	$(BIN)/jupyter-book build . --all -W -n --keep-going
	@echo "Open _build/html/index.html in a browser, or run: make serve"

test: .venv/installed
	$(BIN)/pytest

refresh: .venv/installed  ## make refresh, or make refresh chapter=04
	$(BIN)/python tools/chapters.py refresh $(chapter)

serve: book
	$(BIN)/python -m http.server 8000 --bind 127.0.0.1 --directory _build/html

status: .venv/installed
	$(BIN)/python tools/chapters.py status

seeds: .venv/installed  ## make seeds, or make seeds chapter=04
	$(BIN)/python tools/seeds.py $(chapter)

current: .venv-current/installed
	$(CURRENT)/pytest notebooks

.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	@touch $@

.venv-current/installed: requirements-current.txt constraints.txt
	$(PYTHON) -m venv .venv-current
	$(CURRENT)/python -m pip install -r requirements-current.txt
	@touch $@
