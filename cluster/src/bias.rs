//! Biases of tokens as people give them, on the command line and in bodies: −100 to 100, as OpenAI's API
//! has them.

use lite_llm_transport::messages::TokenBias;

/// Tokens whose logits are biased, at most.
const TOKENS_MAX: usize = 1024;

/// Biases, checked, by id. −100 excludes a token.
pub(crate) fn biases(
    given: impl IntoIterator<Item = (u32, f32)>,
) -> Result<Vec<TokenBias>, String> {
    let mut bias = Vec::new();
    for (id, value) in given {
        if !(-100.0..=100.0).contains(&value) {
            return Err(format!("the bias of token {id} is {value}; -100 to 100 is expected"));
        }
        // OpenAI's word for never.
        let value = if value == -100.0 { f32::NEG_INFINITY } else { value };
        bias.push(TokenBias { id, bias: value });
    }
    if bias.len() > TOKENS_MAX {
        let found = bias.len();
        return Err(format!("{found} tokens are biased; at most {TOKENS_MAX} may be"));
    }
    bias.sort_by_key(|bias| bias.id);
    match bias.windows(2).find(|two| two[0].id == two[1].id) {
        Some(twice) => Err(format!("token {} is biased twice; once is expected", twice[0].id)),
        None => Ok(bias),
    }
}

/// The id of a token, written as a number.
pub(crate) fn token(text: &str) -> Result<u32, String> {
    text.trim().parse().map_err(|_| {
        let shown: String = text.chars().take(40).collect();
        format!("{shown:?} is no token id; `lite-llm tokenize` shows those of a text")
    })
}
