//! Spans that cross the wire: W3C trace context out of a span, and spans under a remote parent. And what
//! a request asks of a model, in the words of OpenTelemetry's semantic conventions for generative AI.

use lite_llm_transport::messages::{JobRequest, TraceContext};
use opentelemetry::{
    Array, StringValue, Value,
    trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState},
};
use tracing::{Span, debug_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The context that a message sent within this span carries; all zero if nothing is traced.
pub fn context_of(span: &Span) -> TraceContext {
    if span.is_disabled() {
        return TraceContext::default();
    }
    let context = span.context();
    let context = context.span().span_context().clone();
    TraceContext {
        trace_id: context.trace_id().to_bytes(),
        span_id: context.span_id().to_bytes(),
        flags: context.trace_flags().to_u8(),
    }
}

/// Puts a span under a parent of another process.
pub fn adopt(span: &Span, parent: TraceContext) {
    if span.is_disabled() || !parent.is_valid() {
        return;
    }
    let parent = SpanContext::new(
        TraceId::from_bytes(parent.trace_id),
        SpanId::from_bytes(parent.span_id),
        TraceFlags::new(parent.flags),
        true,
        TraceState::NONE,
    );
    // It fails where no exporter listens, and then there is nothing to put in order.
    let _ = span.set_parent(opentelemetry::Context::new().with_remote_span_context(parent));
}

/// What is done for a request, as the conventions call it (`gen_ai.operation.name`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A conversation goes on.
    Chat,
    /// A text goes on.
    TextCompletion,
}

impl Operation {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::TextCompletion => "text_completion",
        }
    }
}

/// Says in a request's span what it asks of a model.
pub fn describe(span: &Span, operation: Operation, model: &str, request: &JobRequest) {
    if span.is_disabled() {
        return;
    }
    span.set_attribute("gen_ai.operation.name", operation.as_str());
    span.set_attribute("gen_ai.provider.name", "lite-llm");
    span.set_attribute("gen_ai.request.model", model.to_owned());
    // As many as fit is no number that somebody asked for.
    if request.max_new_tokens != u32::MAX {
        span.set_attribute("gen_ai.request.max_tokens", i64::from(request.max_new_tokens));
    }
    span.set_attribute("gen_ai.request.temperature", f64::from(request.temperature));
    span.set_attribute("gen_ai.request.top_p", f64::from(request.top_p));
    if request.top_k > 0 {
        span.set_attribute("gen_ai.request.top_k", f64::from(request.top_k));
    }
    span.set_attribute("gen_ai.request.seed", request.seed as i64);
}

/// Says in a request's span what it used, and how each of its answers ended, of those that did.
pub fn describe_end(span: &Span, input: u64, output: u64, finishes: &[&'static str]) {
    if span.is_disabled() {
        return;
    }
    span.set_attribute("gen_ai.usage.input_tokens", input as i64);
    span.set_attribute("gen_ai.usage.output_tokens", output as i64);
    if !finishes.is_empty() {
        let words = finishes.iter().map(|&word| StringValue::from(word)).collect();
        let words = Value::Array(Array::String(words));
        span.set_attribute("gen_ai.response.finish_reasons", words);
    }
}

/// A span of work for a batch of another node.
pub fn remote_span(name: &'static str, parent: TraceContext, layer: u16, calls: usize) -> Span {
    let span = debug_span!("remote", otel.name = name, layer, calls);
    adopt(&span, parent);
    span
}
