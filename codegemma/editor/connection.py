"""Handles LSP's messages about documents instead of pygls, whose documents end lines where LSP does not."""

from __future__ import annotations

from typing import Any

from lsprotocol import types
from pygls.exceptions import JsonRpcException
from pygls.protocol import JsonRPCNotification, LanguageServerProtocol, lsp_method

# Notebooks of every kind.
NOTEBOOKS = types.NotebookDocumentSyncOptions([types.NotebookDocumentFilterWithNotebook("*")])


class LspConnection(LanguageServerProtocol):
    """pygls with the documents of an `EditorServer` in place of its own."""

    _server: Any

    @lsp_method(types.TEXT_DOCUMENT_DID_OPEN)
    def lsp_text_document__did_open(self, params: types.DidOpenTextDocumentParams) -> None:
        self._server.document_opened(params.text_document)

    @lsp_method(types.TEXT_DOCUMENT_DID_CHANGE)
    def lsp_text_document__did_change(self, params: types.DidChangeTextDocumentParams) -> None:
        self._server.document_changed(params.text_document.uri, params.content_changes)

    @lsp_method(types.TEXT_DOCUMENT_DID_CLOSE)
    def lsp_text_document__did_close(self, params: types.DidCloseTextDocumentParams) -> None:
        self._server.document_closed(params.text_document.uri)

    @lsp_method(types.NOTEBOOK_DOCUMENT_DID_OPEN)
    def lsp_notebook_document__did_open(self, params: types.DidOpenNotebookDocumentParams) -> None:
        notebook = params.notebook_document
        self._server.documents.notebooks[notebook.uri] = [cell.document for cell in notebook.cells]
        for item in params.cell_text_documents:
            self._server.document_opened(item)

    @lsp_method(types.NOTEBOOK_DOCUMENT_DID_CHANGE)
    def lsp_notebook_document__did_change(self, params: types.DidChangeNotebookDocumentParams) -> None:
        cells = params.change.cells
        if cells and cells.structure:
            self._server.documents.change_cells(params.notebook_document.uri, cells.structure.array)
            for item in cells.structure.did_open or ():
                self._server.document_opened(item)
            for closed in cells.structure.did_close or ():
                self._server.document_closed(closed.uri)
        for content in (cells and cells.text_content) or ():
            self._server.document_changed(content.document.uri, content.changes)

    @lsp_method(types.NOTEBOOK_DOCUMENT_DID_CLOSE)
    def lsp_notebook_document__did_close(self, params: types.DidCloseNotebookDocumentParams) -> None:
        self._server.documents.notebooks.pop(params.notebook_document.uri, None)
        for closed in params.cell_text_documents:
            self._server.document_closed(closed.uri)

    def structure_message(self, data: dict[str, Any]) -> Any:
        """Reads a message.

        Clients older than the final specification count trigger kinds from 0, so 0 (or no kind) is read as 1,
        "invoked". Their 1 means "automatic", which cannot be told from a new client's "invoked".
        A request with wrong parameters is answered with an error, where pygls would let the client wait.
        """
        params = data.get("params")
        if data.get("method") == types.TEXT_DOCUMENT_INLINE_COMPLETION and isinstance(params, dict):
            context = params.get("context") or {}
            if isinstance(context, dict):
                params["context"] = context | {"triggerKind": context.get("triggerKind") or 1}
        try:
            return super().structure_message(data)
        except JsonRpcException as error:
            if "id" not in data or "method" not in data:
                raise
            self._send_response(data["id"], error=error.to_response_error())
            return JsonRPCNotification("$/wrong", self.VERSION, None)  # which pygls ignores
