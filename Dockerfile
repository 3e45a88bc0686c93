# The tests, or any target:  docker build -t dvc-qlora . && docker run dvc-qlora [make repro]
FROM python:3.11-slim-bookworm
RUN apt-get update \
 && apt-get install --yes --no-install-recommends git make bsdextrautils procps \
 && rm -rf /var/lib/apt/lists/*
# An index with torch's CPU build saves 4 GB: --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /dvc-qlora
COPY Makefile requirements.lock ./
RUN make .venv/.ready
COPY . .
RUN git config --global --add safe.directory '*' && git config --global user.name dvc-qlora \
 && git config --global user.email dvc-qlora@localhost
CMD ["make", "test"]
