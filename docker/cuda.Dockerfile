# A server on NVIDIA GPUs: docker build -f docker/cuda.Dockerfile -t memento-cuda .
# The devel image, because FlashInfer compiles kernels when they are first needed.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/memento
COPY . /src
RUN /opt/memento/bin/pip install --no-cache-dir '/src[serve]'
RUN /opt/memento/bin/memento doctor
RUN useradd --create-home memento

USER memento
WORKDIR /home/memento
ENV PATH=/opt/memento/bin:$PATH
EXPOSE 30000
ENTRYPOINT ["memento"]
CMD ["serve", "demo", "--host", "0.0.0.0"]
