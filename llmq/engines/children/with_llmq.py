"""llmq's own loader: transformers' modules with packed layers. The only file of this folder that needs llmq."""

import with_transformers

import llmq


class Engine(with_transformers.Engine):
    def _load(self, path, options):
        self.version = f"llmq {llmq.__version__}"
        return llmq.load(path, device=self._device, trust_remote_code=options["remote_code"])
