# docker build -t egjax .                        CPU
# docker build -t egjax --build-arg EXTRA=cuda .   or tpu
# docker run --rm -v "$PWD/runs:/egjax/runs" egjax experiments.pipeline
#   with GPUs: --gpus all; with TPUs: --privileged --net=host
FROM python:3.12-slim
ARG EXTRA=""
WORKDIR /egjax
COPY . .
RUN pip install --no-cache-dir -e ".[all${EXTRA:+,$EXTRA}]" \
  && (pip install --no-cache-dir --no-deps virtualhome-eval==0.1.1 \
      || echo "RobotHow data could not be had: the embedded household serves instead")
ENV EGJAX_MULTI_HOST=auto PYTHONUNBUFFERED=1
# SIGTERM reaches Python itself, which saves and leaves.
ENTRYPOINT ["python", "-m"]
CMD ["experiments.pipeline"]
