"""Images and responses in any form -> subjects in the project's own form (see featcache.dataset.folder)."""
